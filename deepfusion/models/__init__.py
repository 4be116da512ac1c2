"""On-device language models and global MoEs by name."""
