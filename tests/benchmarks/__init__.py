"""What the sweep costs: against other ways to get the same maps, against the least possible work, and where its time goes."""
