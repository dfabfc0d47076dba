"""What every package uses: files, console, settings, command lines."""
