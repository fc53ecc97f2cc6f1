"""Other people's code, with imu_fast under it."""
