"""One file per packing: ``@formats.register("name")`` on a class with the methods of ``WeightFormat``."""
