"""The words that generated container names are made of: a trait, and somebody worth remembering."""

from __future__ import annotations

_TRAITS = """
able airy amber ample azure balmy bold brave breezy bright brisk bubbly calm candid careful
cheery civil clear clever coastal cosmic cozy crisp curious dapper daring deft dewy eager early
earnest easy even exact fabled fair fearless fine firm fleet fluent fond frank fresh gallant
gentle glad golden graceful grand hale handy hardy hearty helpful honest humble ideal jaunty
jolly jovial keen kind lasting leafy level limber lively lofty loyal lucid lucky lunar mellow
merry mighty mild modest neat nimble noble novel open orderly patient placid plucky poised
polite prime proud pure quick quiet radiant rapid ready rosy rugged sage sanguine serene sharp
shiny silent silver smooth snug solar solid sound spry stable steady stellar stoic sturdy subtle
sunny supple sure swift tender thorough tidal tidy tireless tranquil trim true trusty upbeat
valiant vast vivid warm wise witty woven young zesty
"""

_SURNAMES = """
abel agnesi airy ampere amundsen apgar arago aristarchus ashby avicenna baird banneker bechet
bernoulli bingen blackwell boltzmann boole bouchet brahe braille brunel burnell calderon cannon
carver cassini cauchy celsius chandra charpentier coltrane copernicus cousteau cray crick dalton
deledda dirac drake earhart eckert edgeworth ekman ellington eratosthenes escher euler faraday
fermi fibonacci fleming foucault fresnel fuller galois gauss gibbs goeppert granville grimshaw
halley hamilton harrison heaviside herschel hertz hilbert hodgkin holberton hubble humboldt
huygens hypatia ibsen ishiguro jansky joliot joule kepler khayyam kilby kirch kovalevsky krogh
lagrange lamarr lander laplace leavitt leibniz linnaeus lister lovelace lumiere magellan mandela
marconi maxwell mayer mcclintock meitner mendel merian mersenne messier millikan mirzakhani
mitchell morisot morse moser nansen napier nightingale nobel noether ohm oresme ortelius pascal
pasteur payne perkin piaget planck poincare ptolemy quimby ramanujan rayleigh riemann ritchie
roentgen rubin runge sabin sagan salk savery schiaparelli shannon sharman somerville steinmetz
stokes strabo tacke tesla thales tharp theremin torricelli tsu turing ulam vaughan verne
vesalius volta wallace watt wegener wren wu yalow yeager young zeno zuse
"""

TRAITS = tuple(_TRAITS.split())
SURNAMES = tuple(_SURNAMES.split())
