"""What MPI's processes ask of whoever started them."""
