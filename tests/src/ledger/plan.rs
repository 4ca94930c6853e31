//! What is sent: a function of seed, flow and sequence number, so that both ends know it without talking about it.

use std::fmt;
use std::str::FromStr;

use anyhow::Context as _;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// One request of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Id {
    /// A client's sequence of requests, one at a time.
    pub flow: u32,
    /// Counts from 0 in each flow.
    pub seq: u32,
}

/// The traffic of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The same seed is the same traffic.
    pub seed: u64,
}

/// One request and its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Whether it carries the header of an intercept.
    pub mine: bool,
    /// Body of the request.
    pub request: Vec<u8>,
    /// Body of the reply.
    pub reply: Vec<u8>,
}

/// One body in eight is large enough to span many reads and, on HTTP/2, more than one window.
const LARGE: usize = 128 << 10;
const SMALL: usize = 600;

impl Plan {
    /// The request of that number and the one right reply.
    pub fn exchange(self, id: Id) -> Exchange {
        let number = u64::from(id.flow) << 32 | u64::from(id.seq);
        // Neighbouring numbers must not give neighbouring streams, hence the odd constant (Knuth, TAOCP 3.3.4).
        let mut random =
            StdRng::seed_from_u64(self.seed ^ number.wrapping_mul(6_364_136_223_846_793_005));
        let mine = random.random_bool(0.5);
        let mut body = || {
            let most = if random.random_ratio(1, 8) {
                LARGE
            } else {
                SMALL
            };
            let mut body = vec![0; random.random_range(0..=most)];
            random.fill_bytes(&mut body);
            body
        };
        Exchange {
            mine,
            request: body(),
            reply: body(),
        }
    }
}

/// Header that names the request: `seed/flow/seq`.
pub const REQUEST_HEADER: &str = "x-ledger";

/// What stands in the request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The run.
    pub plan: Plan,
    /// The request.
    pub id: Id,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.plan.seed, self.id.flow, self.id.seq)
    }
}

impl FromStr for Label {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut parts = text.splitn(3, '/');
        let mut next = || parts.next().context("seed/flow/seq");
        Ok(Self {
            plan: Plan {
                seed: next()?.parse()?,
            },
            id: Id {
                flow: next()?.parse()?,
                seq: next()?.parse()?,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_number_is_the_same_exchange_and_no_other_one_is() {
        let plan = Plan { seed: 7 };
        let id = Id { flow: 1, seq: 2 };

        assert_eq!(plan.exchange(id), plan.exchange(id));
        for other in [Id { flow: 2, seq: 1 }, Id { flow: 1, seq: 3 }] {
            assert_ne!(plan.exchange(id), plan.exchange(other));
        }
        assert_ne!(plan.exchange(id), Plan { seed: 8 }.exchange(id));
    }

    #[test]
    fn half_are_mine_and_some_are_large() {
        let plan = Plan { seed: 1 };
        let all: Vec<_> = (0..400)
            .map(|seq| plan.exchange(Id { flow: 0, seq }))
            .collect();
        let mine = all.iter().filter(|exchange| exchange.mine).count();
        let large = all
            .iter()
            .filter(|exchange| exchange.reply.len() > SMALL)
            .count();

        assert!((150..250).contains(&mine), "{mine}");
        assert!((20..100).contains(&large), "{large}");
    }

    #[test]
    fn a_label_is_read_as_it_was_written() {
        let label = Label {
            plan: Plan { seed: u64::MAX },
            id: Id { flow: 3, seq: 4 },
        };
        assert_eq!(label.to_string().parse::<Label>().unwrap(), label);
        assert!("1/2".parse::<Label>().is_err());
    }
}
