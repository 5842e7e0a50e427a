"""Runs that several test modules of this room compare with."""

from helpers.runs import cache, quick_disk, whole

__all__ = ["cache", "quick_disk", "whole"]
