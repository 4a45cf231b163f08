"""``python -m penult``: what torchrun starts."""

from penult.cli import main

if __name__ == "__main__":
    main()
