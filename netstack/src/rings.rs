//! Closed sockets with their ring buffers, kept for the next flow.
//!
//! A fresh megabyte of buffers costs more page faults than a handshake costs packets, so closed sockets are pooled whole
//! and the warmest is used first. One budget bounds the bytes all flows could ever buffer, and each size of ring may take
//! an eighth of it: the first flows get large rings, the thousandth a smaller one, the ten thousandth a small one that
//! still carries it. Small rings also lie close together, which page tables and caches reward when there are many.

use smoltcp::socket::tcp;

use crate::sys::MappedSocket;

/// Pools of closed sockets, one per ring size.
pub(crate) struct Pool {
    classes: Vec<Class>,
    /// Bytes of rings that flows hold, both directions.
    used: usize,
    budget: usize,
    burst: usize,
}

#[derive(Default)]
struct Class {
    idle: Vec<MappedSocket>,
    /// Sockets on loan.
    lent: usize,
    /// Sockets below this index have had their memory given back.
    discarded: usize,
    /// The smallest number idle since the last sweep: those were not needed for that long.
    unused: usize,
}

/// A socket on loan, with the class it returns to.
pub(crate) struct Loan {
    pub(crate) socket: MappedSocket,
    class: usize,
}

/// Smallest and largest ring, in bytes and as powers of two. 16 KiB still carries a flow; 512 KiB fills a path of 5 Gbit/s
/// at 0.8 ms, and a tunnel's own window takes over beyond.
const SMALLEST: usize = 16 << 10;
const CLASSES: usize = 6;
/// Every class but the smallest may take this part of the budget.
const PART: usize = 8;
/// Idle sockets kept in each class.
const KEPT: usize = 4096;

impl Pool {
    /// A pool for `budget` bytes in all. Rings are multiples of `burst`, the payload of the largest segment, because a
    /// segment cannot go past a ring's end.
    pub(crate) fn new(budget: usize, burst: usize) -> Self {
        let classes = (0..CLASSES).map(|_| Class::default()).collect();
        Self {
            classes,
            used: 0,
            budget,
            burst,
        }
    }

    /// A closed socket, or `None` when the budget or the address space is spent.
    pub(crate) fn take(&mut self) -> Option<Loan> {
        let class = self.affordable()?;
        let ring = self.ring(class);
        let pool = &mut self.classes[class];
        let socket = match pool.idle.pop() {
            Some(socket) => socket,
            None => MappedSocket::new(ring)?,
        };
        pool.discarded = pool.discarded.min(pool.idle.len());
        pool.unused = pool.unused.min(pool.idle.len());
        pool.lent += 1;
        self.used += pair(class);
        Some(Loan { socket, class })
    }

    /// Takes a socket back, whatever its state.
    pub(crate) fn put(&mut self, loan: Loan) {
        let Loan { mut socket, class } = loan;
        self.used -= pair(class);
        let pool = &mut self.classes[class];
        pool.lent -= 1;
        if pool.idle.len() < KEPT {
            socket.with_socket(wipe);
            pool.idle.push(socket);
        }
    }

    /// Gives back the memory of sockets that nobody needed since the last sweep. To be called about once a second.
    /// Answers whether there is any more to give back.
    pub(crate) fn sweep(&mut self) -> bool {
        for class in &mut self.classes {
            let unused = class.unused.min(class.idle.len());
            for socket in class.idle.iter_mut().take(unused).skip(class.discarded) {
                socket.discard();
            }
            class.discarded = class.discarded.max(unused);
            class.unused = class.idle.len();
        }
        self.classes
            .iter()
            .any(|class| class.discarded < class.idle.len())
    }

    /// Bytes of rings that flows hold, and the bound on them.
    pub(crate) fn used(&self) -> (usize, usize) {
        (self.used, self.budget)
    }

    /// The largest class that has not used up its part; the smallest may take all that is left.
    fn affordable(&self) -> Option<usize> {
        let part = self.budget / PART;
        let class = (1..CLASSES)
            .rev()
            .find(|class| (self.classes[*class].lent + 1) * pair(*class) <= part);
        let class = class.unwrap_or(0);
        (self.used + pair(class) <= self.budget).then_some(class)
    }

    fn ring(&self, class: usize) -> usize {
        let size = SMALLEST << class;
        if self.burst == 0 || size < self.burst {
            size
        } else {
            size / self.burst * self.burst
        }
    }
}

impl Loan {
    /// Bytes of the budget this loan takes.
    pub(crate) fn cost(&self) -> usize {
        pair(self.class)
    }
}

fn pair(class: usize) -> usize {
    2 * (SMALLEST << class)
}

/// Empties both queues and forgets the peer. `listen` resets every field of a closed socket, `close` then leaves it closed.
fn wipe(socket: &mut tcp::Socket<'_>) {
    socket.abort();
    let listening = socket.listen(1);
    debug_assert!(
        listening.is_ok(),
        "an aborted socket is closed and 1 is a port"
    );
    socket.close();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_shrink_as_the_budget_is_spent_and_then_run_out() {
        let mut pool = Pool::new(64 << 20, 0);
        let loans: Vec<Loan> = std::iter::from_fn(|| pool.take()).collect();
        let capacities: Vec<usize> = loans
            .iter()
            .map(|loan| loan.socket.socket().recv_capacity())
            .collect();

        assert!(capacities.is_sorted_by(|a, b| a >= b));
        assert_eq!(capacities.last(), Some(&SMALLEST));
        let (used, budget) = pool.used();
        assert!(
            used <= budget && budget - used < pair(1),
            "{used} of {budget}"
        );
    }

    #[test]
    fn four_gigabytes_serve_sixty_thousand_flows_and_the_first_ones_well() {
        let mut pool = Pool::new(4 << 30, 0);
        let mut flows = 0;
        let mut large = 0;
        while let Some(class) = pool.affordable() {
            pool.used += pair(class);
            pool.classes[class].lent += 1;
            large += usize::from(class == CLASSES - 1);
            flows += 1;
        }

        assert!(pool.used <= 4 << 30);
        assert!(flows > 60_000, "{flows} flows");
        assert_eq!((large, pool.ring(CLASSES - 1)), (512, 512 << 10));
    }

    #[test]
    fn a_returned_socket_is_closed_empty_and_used_next() {
        let mut pool = Pool::new(1 << 30, 0);
        let mut loan = pool.take().unwrap();
        loan.socket.with_socket(|socket| socket.listen(80)).unwrap();
        pool.put(loan);

        let loan = pool.take().unwrap();

        assert_eq!(loan.socket.socket().state(), tcp::State::Closed);
        assert_eq!(loan.socket.socket().send_queue(), 0);
    }

    #[test]
    fn rings_are_whole_segments() {
        let pool = Pool::new(1 << 30, 65_480);

        assert_eq!(pool.ring(CLASSES - 1) % 65_480, 0);
        assert_eq!(pool.ring(0), SMALLEST);
    }
}
