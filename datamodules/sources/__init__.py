"""Sources of rows: tables, image folders and images, with their splits and labels."""
