"""An exported model: one folder with sizes, parameters, vocabulary and sampling defaults."""
