"""`python -m distill_app` is the console command."""

from distill_app.cli import main

if __name__ == "__main__":
    main()
