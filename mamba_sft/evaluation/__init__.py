"""What a run is judged by, before and after training.

Read `prompts` (sample prompts, the answers of the base and of the tuned model, exact match), `losses` (did
the loss rise), then `report` (the page about a run: loss, figures, answers, recipe, environment). The loss on
held-out rows is computed in `inference.scoring`, because a merge needs it too.
"""
