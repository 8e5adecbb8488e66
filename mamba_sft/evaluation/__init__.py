"""What a run is judged by, before and after training.

Read `prompts` (sample prompts, their answers, exact match) and `report` (the page about a run).
"""
