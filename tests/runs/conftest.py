"""Runs that several test modules of this room compare with."""

from helpers.runs import cache, whole

__all__ = ["cache", "whole"]
