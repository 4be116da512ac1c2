"""What happens on a device: its training, its embedding, its upload."""
