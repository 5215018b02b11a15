"""`python -m diffalign`, for `accelerate launch -m diffalign train ...`."""

from diffalign.cli import main

if __name__ == "__main__":
    main()
