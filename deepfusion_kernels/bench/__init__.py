"""Timing, rooflines and the runner that turns cases into rows."""
