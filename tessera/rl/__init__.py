"""Where experience comes from: what checks an answer, the jail, and the rewards made of both."""
