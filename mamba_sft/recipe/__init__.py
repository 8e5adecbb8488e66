"""Every setting of a run, from YAML to a frozen tree of sections. Imports no torch.

Read `fields` (what can be set, with its help), `spans` (lengths as shares, steps or tokens), `recipe` (the
tree itself, and how it is loaded), then `conflicts` (what fields owe each other), `schedule_conflicts` and
`mixtures` (the same for learning rate and batch, and for sources and stages), `builtin` and `globs` (where
recipes and data are found), `yaml_text` (YAML in and out, with line numbers), `messages` (values that do not
fit, as messages with file and line), `other_tools` (the names that other trainers use, for suggestions),
`options` (fields written as options) and `trainer_arguments` (what SFTConfig has beside that).
Code below takes the section it needs, never the whole recipe.
"""
