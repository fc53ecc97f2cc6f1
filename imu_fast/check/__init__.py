"""What ``imu-fast check`` runs: every operation here against its definition, and its time."""
