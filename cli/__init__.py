"""The `sest` command: parse, call one function, render. No science lives here."""
