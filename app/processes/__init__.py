"""Several processes as one service: who starts, watches, feeds and replaces whom."""
