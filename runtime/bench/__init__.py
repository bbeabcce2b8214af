"""How fast a converted model is on this machine, and where the time goes: `glassine bench`.

folder -> its parts, and whole pictures -> children that time them -> report -> table, JSON, chart, comparison
"""
