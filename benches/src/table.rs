//! Results as text: medians, spread, and the comparison with the peers of the same rounds.

use std::collections::HashMap;
use std::process::Command;

/// What stands beside the figures.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// Nothing.
    Plain,
    /// The ratio to each of these rows.
    Ratio(&'static [&'static str]),
    /// The difference to this row.
    Difference(&'static str),
}

/// One question's rounds. Groups and rows keep the order in which they first came.
#[derive(Debug)]
pub struct Table {
    title: String,
    value: Value,
    order: Vec<(String, &'static str)>,
    rounds: HashMap<(String, &'static str), Vec<Option<f64>>>,
}

impl Table {
    /// Without a row yet.
    pub fn new(title: &str, value: Value) -> Self {
        Self {
            title: title.to_owned(),
            value,
            order: Vec::new(),
            rounds: HashMap::new(),
        }
    }

    /// One round's figure of one row; `None` if the tool failed in it.
    pub fn add(&mut self, group: impl ToString, row: &'static str, value: impl Into<Option<f64>>) {
        let key = (group.to_string(), row);
        if !self.rounds.contains_key(&key) {
            self.order.push(key.clone());
        }
        self.rounds.entry(key).or_default().push(value.into());
    }

    /// Writes it to standard output.
    #[expect(clippy::print_stdout, reason = "the table is the program's data")]
    pub fn print(&self) {
        println!("\n{}", self.title);
        let mut header = format!(
            "  {:<14}{:<20}{:>6}{:>32}",
            "", "", "rounds", "median [least, most]"
        );
        for base in self.bases() {
            header += &format!("{:>24}", self.compared(base));
        }
        println!("{header}");
        for key in &self.order {
            let rounds = &self.rounds[key];
            let failed = rounds.iter().filter(|value| value.is_none()).count();
            let mut line = format!(
                "  {:<14}{:<20}{:>6}{:>32}",
                key.0,
                key.1,
                rounds.len(),
                spread(rounds.iter().flatten().copied().collect())
            );
            for base in self.bases() {
                let against = self.rounds.get(&(key.0.clone(), *base));
                let cell = against
                    .filter(|_| *base != key.1)
                    .map(|against| self.compare(rounds, against));
                line += &format!("{:>24}", cell.unwrap_or_default());
            }
            if failed > 0 {
                line += &format!("  failed in {failed}");
            }
            println!("{line}");
        }
    }

    fn bases(&self) -> &[&'static str] {
        match &self.value {
            Value::Plain => &[],
            Value::Ratio(bases) => bases,
            Value::Difference(base) => std::slice::from_ref(base),
        }
    }

    fn compared(&self, base: &str) -> String {
        match self.value {
            Value::Plain => String::new(),
            Value::Ratio(_) => format!("/ {base}"),
            Value::Difference(_) => format!("- {base}"),
        }
    }

    /// Only rounds that both have count.
    fn compare(&self, values: &[Option<f64>], base: &[Option<f64>]) -> String {
        let pairs = values.iter().zip(base);
        let pairs = pairs.filter_map(|(value, base)| Some(((*value)?, (*base)?)));
        spread(match self.value {
            Value::Plain | Value::Ratio(_) => pairs.map(|(value, base)| value / base).collect(),
            Value::Difference(_) => pairs.map(|(value, base)| value - base).collect(),
        })
    }
}

/// Median, least and most, with the digits that matter.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else {
        return "-".to_owned();
    };
    let digits = if *most < 20.0 { 2 } else { 0 };
    let median = values[values.len() / 2];
    format!("{median:.digits$} [{least:.digits$}, {most:.digits$}]")
}

/// Writes what the figures belong to: the machine, and what each of the commands says of itself.
#[expect(clippy::print_stdout, reason = "the table is the program's data")]
pub fn print_machine(versions: &[&[&str]]) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{}, {cores} cores", first_line(&["uname", "-sr"]));
    for command in versions {
        println!("{}", first_line(command));
    }
}

fn first_line(command: &[&str]) -> String {
    let [program, arguments @ ..] = command else {
        return String::new();
    };
    let Ok(output) = Command::new(program).args(arguments).output() else {
        return format!("{program} is not installed");
    };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}
