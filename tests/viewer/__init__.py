"""The page that shows rollouts: what stands in the file, and (in ``test_browser``) what a browser makes of it."""
