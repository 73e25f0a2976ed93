"""What every command needs of a run: its folder, errors, display, interrupts, log, machine, plots and tables."""
