//! What became of each socket of the program that the keeper had a hand in. Pure: it knows sockets by their cookie,
//! which the kernel gives out once (`SO_COOKIE`), and those who wait by nothing at all.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;

use super::sys::Answer;

/// Sockets that are remembered after they were joined or have failed. A forgotten one shows the loopback as its peer.
const REMEMBERED: usize = 65_536;

/// The sockets of one program; `W` is a call that waits.
#[derive(Debug)]
pub(super) struct Sockets<W> {
    entries: HashMap<u64, Entry<W>>,
    /// Of those that may be forgotten, oldest first.
    order: VecDeque<u64>,
}

impl<W> Default for Sockets<W> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

#[derive(Debug)]
enum Entry<W> {
    /// A flow is being opened. `heard`: the program was told that it is in progress.
    Dialling {
        waiting: Vec<W>,
        heard: bool,
        lead: Option<Lead>,
    },
    /// It leads to where the program wanted. `heard`: the program was told.
    Joined { lead: Lead, heard: bool },
    /// A non-blocking connect has failed and the program has not asked how it ended.
    Failed(i32),
}

/// Where the program asked to go, and the loopback address that the kernel shows instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lead {
    asked: SocketAddr,
    shown: SocketAddr,
}

/// What to do about a connect.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<W> {
    /// Open a flow. A non-blocking call comes back, a blocking one waits in here.
    Dial(Option<W>),
    /// It waits for the flow that is being opened already.
    Waits,
    /// Answer it.
    Answer(W, Answer),
}

impl<W> Sockets<W> {
    /// A program connects. `has_peer`: the kernel says that it is connected already.
    pub(super) fn connect(
        &mut self,
        cookie: u64,
        blocking: bool,
        has_peer: bool,
        call: W,
    ) -> Step<W> {
        match self.entries.get_mut(&cookie) {
            Some(Entry::Dialling { waiting, .. }) if blocking => {
                waiting.push(call);
                Step::Waits
            }
            Some(Entry::Dialling { heard: true, .. }) => {
                Step::Answer(call, Answer::Error(libc::EALREADY))
            }
            // A signal came between the first call and its answer: this is that call again.
            Some(Entry::Dialling { heard: false, .. }) => {
                Step::Answer(call, Answer::Error(libc::EINPROGRESS))
            }
            Some(Entry::Joined { heard: true, .. }) if has_peer => {
                Step::Answer(call, Answer::Continue)
            }
            Some(Entry::Joined { heard: false, .. }) if has_peer => {
                Step::Answer(call, Answer::Value(0))
            }
            Some(Entry::Failed(number)) => {
                let number = *number;
                self.entries.remove(&cookie);
                Step::Answer(call, Answer::Error(number))
            }
            None if has_peer => Step::Answer(call, Answer::Continue),
            // Joined once, and the program has dissolved that.
            Some(Entry::Joined { .. }) | None => {
                let (waiting, call) = match blocking {
                    true => (vec![call], None),
                    false => (Vec::new(), Some(call)),
                };
                let entry = Entry::Dialling {
                    waiting,
                    heard: false,
                    lead: None,
                };
                self.entries.insert(cookie, entry);
                Step::Dial(call)
            }
        }
    }

    /// The program has taken an answer: that a connect is in progress, or that it has succeeded.
    pub(super) fn heard(&mut self, cookie: u64) {
        match self.entries.get_mut(&cookie) {
            Some(Entry::Dialling { heard, .. } | Entry::Joined { heard, .. }) => *heard = true,
            Some(Entry::Failed(_)) | None => {}
        }
    }

    /// It will lead to where the program asked, as soon as it leads anywhere.
    pub(super) fn held(&mut self, cookie: u64, asked: SocketAddr, shown: SocketAddr) {
        match self.entries.get_mut(&cookie) {
            Some(Entry::Dialling { lead, .. }) => *lead = Some(Lead { asked, shown }),
            Some(Entry::Joined { .. } | Entry::Failed(_)) | None => {}
        }
    }

    /// It leads to where the program asked. Gives those who wait.
    pub(super) fn joined(&mut self, cookie: u64, asked: SocketAddr, shown: SocketAddr) -> Vec<W> {
        let (waiting, heard) = match self.entries.remove(&cookie) {
            Some(Entry::Dialling { waiting, heard, .. }) => (waiting, heard),
            Some(Entry::Joined { .. } | Entry::Failed(_)) | None => (Vec::new(), true),
        };
        let lead = Lead { asked, shown };
        self.remember(cookie, Entry::Joined { lead, heard });
        waiting
    }

    /// It is not for the keeper, or a blocking call has failed, which is said at once. Gives those who wait.
    pub(super) fn forget(&mut self, cookie: u64) -> Vec<W> {
        match self.entries.remove(&cookie) {
            Some(Entry::Dialling { waiting, .. }) => waiting,
            Some(Entry::Joined { .. } | Entry::Failed(_)) | None => Vec::new(),
        }
    }

    /// A non-blocking connect has failed, and the program will ask how.
    pub(super) fn failed(&mut self, cookie: u64, number: i32) {
        self.remember(cookie, Entry::Failed(number));
    }

    /// How a connect failed, said once.
    pub(super) fn take_error(&mut self, cookie: u64) -> Option<i32> {
        match self.entries.get(&cookie) {
            Some(Entry::Failed(number)) => {
                let number = *number;
                self.entries.remove(&cookie);
                Some(number)
            }
            Some(Entry::Dialling { .. } | Entry::Joined { .. }) | None => None,
        }
    }

    /// Where the program wanted to go, if what the kernel shows as the peer is our doing.
    pub(super) fn asked(&self, cookie: u64, peer: SocketAddr) -> Option<SocketAddr> {
        let lead = match self.entries.get(&cookie)? {
            Entry::Joined { lead, .. } => *lead,
            Entry::Dialling { lead, .. } => (*lead)?,
            Entry::Failed(_) => return None,
        };
        (lead.shown == peer).then_some(lead.asked)
    }

    /// Whether there is nothing to look for.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn remember(&mut self, cookie: u64, entry: Entry<W>) {
        self.entries.insert(cookie, entry);
        self.order.push_back(cookie);
        while self.order.len() > REMEMBERED {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            if !matches!(self.entries.get(&oldest), Some(Entry::Dialling { .. })) {
                self.entries.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: &str = "10.96.0.9:80";
    const SHOWN: &str = "127.0.0.1:4000";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_second_connect_of_a_non_blocking_socket_is_told_that_there_is_one() {
        let mut sockets = Sockets::default();

        assert_eq!(sockets.connect(1, false, false, 'a'), Step::Dial(Some('a')));
        sockets.heard(1);
        let again = sockets.connect(1, false, false, 'b');

        assert_eq!(again, Step::Answer('b', Answer::Error(libc::EALREADY)));
    }

    #[test]
    fn a_call_that_a_signal_interrupted_goes_on_where_it_was() {
        let mut sockets = Sockets::default();
        sockets.connect(1, false, false, 'a');
        sockets.connect(2, true, false, 'x');

        let again = sockets.connect(1, false, false, 'b');
        let waits = sockets.connect(2, true, false, 'y');

        assert_eq!(again, Step::Answer('b', Answer::Error(libc::EINPROGRESS)));
        assert_eq!(waits, Step::Waits);
        assert_eq!(sockets.joined(2, at(ASKED), at(SHOWN)), ['x', 'y']);
    }

    #[test]
    fn success_that_nobody_heard_is_said_to_who_asks_again() {
        let mut sockets = Sockets::default();
        sockets.connect(1, true, false, 'a');
        sockets.joined(1, at(ASKED), at(SHOWN));

        let again = sockets.connect(1, true, true, 'b');
        sockets.heard(1);
        let third = sockets.connect(1, true, true, 'c');

        assert_eq!(again, Step::Answer('b', Answer::Value(0)));
        assert_eq!(third, Step::Answer('c', Answer::Continue), "EISCONN");
    }

    #[test]
    fn a_failure_is_said_once_to_whoever_asks_first() {
        let mut sockets = Sockets::default();
        sockets.connect(1, false, false, 'a');
        sockets.failed(1, libc::ECONNREFUSED);
        assert_eq!(sockets.take_error(1), Some(libc::ECONNREFUSED));
        assert_eq!(sockets.take_error(1), None);

        sockets.connect(1, false, false, 'a');
        sockets.failed(1, libc::ETIMEDOUT);
        let again = sockets.connect(1, false, false, 'b');
        assert_eq!(again, Step::Answer('b', Answer::Error(libc::ETIMEDOUT)));
        assert_eq!(sockets.connect(1, false, false, 'c'), Step::Dial(Some('c')));
    }

    #[test]
    fn the_peer_is_what_was_asked_for_as_long_as_the_socket_leads_there() {
        let mut sockets = Sockets::<char>::default();
        sockets.joined(1, at(ASKED), at(SHOWN));

        assert_eq!(sockets.asked(1, at(SHOWN)), Some(at(ASKED)));
        assert_eq!(sockets.asked(1, at("127.0.0.1:9")), None);
        assert_eq!(sockets.connect(1, false, false, 'a'), Step::Dial(Some('a')));
        assert_eq!(sockets.asked(1, at(SHOWN)), None);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_what_is_dialled_is_kept() {
        let mut sockets = Sockets::default();
        sockets.connect(0, true, false, 'a');
        for cookie in 1..REMEMBERED as u64 + 10 {
            sockets.joined(cookie, at(ASKED), at(SHOWN));
        }

        assert!(sockets.entries.len() <= REMEMBERED + 1);
        assert_eq!(sockets.forget(0), ['a']);
    }
}
