"""A generated corpus of captioned scenes: groups of coloured shapes, learnt in minutes and made to test binding."""
