"""A certificate of a private reward model, as a site's card has it."""

from accord.rewards.certificate import Certificate

PROOF = Certificate(
    id="0123456789abcdef",
    epsilon=3.0,
    total=8.0,
    delta=1e-6,
    unit="pair",
    way="head",
    sampling=0.2,
    steps=100,
    clip=0.5,
    sigma=1.8,
    projection=1.5,
    standardisation=4.1,
    flip=0.0,
    noise="SHAKE-256",
    version="0.1.0",
    uncovered=("counts", "settings"),
)
