"""Modules that hold options and parameters, and call the doors."""
