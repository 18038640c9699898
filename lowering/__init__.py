"""From graph to code: the svdq:: operators and what they lower to."""
