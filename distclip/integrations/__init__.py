"""Where users already are: one thin file a framework, each importing its framework only when used."""
