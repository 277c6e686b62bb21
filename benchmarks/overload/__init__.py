"""How Seawall and other laws of overload control behave, in simulated time and on real servers."""
