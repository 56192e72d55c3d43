"""The paper's vision protocol: data from folders, models from timm, three passes an epoch."""
