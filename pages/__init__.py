"""The app's pages, one file each. A page picks inputs, calls an analysis and shows figures; what pages share is in `_parts`."""
