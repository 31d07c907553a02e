"""What every command line does alike: errors, notes, progress, units, the process around it."""
