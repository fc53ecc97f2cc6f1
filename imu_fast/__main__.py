"""``python -m imu_fast``: the command line where its script is not on the path."""

from imu_fast.cli.app import app

if __name__ == "__main__":
    app(prog_name="imu-fast")
