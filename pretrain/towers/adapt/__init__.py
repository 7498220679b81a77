"""What is done to a model before it trains: other sizes, patches left out, parts that keep their weights."""
