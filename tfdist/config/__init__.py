"""What a run is, as frozen values that are checked where they are made, and the folder that keeps them."""
