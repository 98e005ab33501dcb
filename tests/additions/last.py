"""An initialisation: the last member's projections."""

from cla_convert.conversion.initialisation import INITIALISATIONS, Pooling

INITIALISATIONS.register(Pooling("last", "keep the last member's projections.", lambda members: members[-1]))
