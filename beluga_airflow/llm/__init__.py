"""Language models: the decision core, the OpenAI client, prices, and the model server for tests and the demo."""
