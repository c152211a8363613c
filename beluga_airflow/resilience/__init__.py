"""What keeps trouble small: retrying."""
