"""`python -m temporal_vae`: the command `tvae`."""

from temporal_vae.cli.main import main

if __name__ == "__main__":
    main()
