"""What people see of runs and studies: tables, plots, the dashboard's pages, files to take away."""
