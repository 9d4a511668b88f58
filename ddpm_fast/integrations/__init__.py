"""Other libraries' networks, pipelines and samplers. Each library is imported only when it is used."""
