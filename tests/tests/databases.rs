//! Real clients of real servers, through the proxy and under `tp run`: a transaction, a publish and a consume, each checked
//! by its data.

use std::time::Duration;

use tp_tests::{Cluster, Connection, Laptop, Namespace, Run, User};

/// Runs a client with this input.
type Client<'a> = &'a dyn Fn(&[&str], &str) -> Run;

/// A laptop in a namespace with one real server, connected. The first client goes through proxychains, the second is run as
/// it is under `tp run`.
fn with_server(name: &str, port: u16, test: impl FnOnce(Client<'_>, Client<'_>, &Namespace<'_>)) {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("data");
    namespace.server(name, name, &[port]);
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp: Connection<'_> = laptop.connect(&[]);
    let (host, proxy_port) = tp.proxy.split_once(':').expect("an address has a port");
    let chain =
        format!("strict_chain\nproxy_dns\nquiet_mode\n[ProxyList]\nsocks5 {host} {proxy_port}\n");
    laptop.write_file("home/proxychains.conf", &chain);
    let client = |command: &[&str], input: &str| {
        let arguments = [&["-q", "-f", "proxychains.conf"], command].concat();
        laptop.run_with(
            "proxychains4",
            &arguments,
            input.as_bytes(),
            Duration::from_secs(60),
        )
    };
    let under_run = |command: &[&str], input: &str| {
        let arguments = [&["run", "--"], command].concat();
        laptop.run_with(
            &tp_tests::laptop::binary("tp"),
            &arguments,
            input.as_bytes(),
            Duration::from_secs(60),
        )
    };
    test(&client, &under_run, &namespace);
}

#[test]
fn postgresql_commits_and_rolls_back_and_streams() {
    with_server("postgres", 5432, |client, under_run, namespace| {
        let psql_by = |client: Client<'_>, sql: &str| {
            let connection = "postgresql://tp:tp@postgres:5432/tp";
            client(&["psql", connection, "-v", "ON_ERROR_STOP=1", "-qAt"], sql)
                .ok()
                .out()
        };
        let psql = |sql: &str| psql_by(client, sql);
        psql(
            "BEGIN; CREATE TABLE t (id int PRIMARY KEY, body text); INSERT INTO t VALUES (1, 'kept'); COMMIT;",
        );
        psql("BEGIN; INSERT INTO t VALUES (2, 'lost'); ROLLBACK;");
        assert_eq!(psql("SELECT id || ' ' || body FROM t;"), "1 kept\n");
        // A hundred thousand rows each way, compared by the server's own sum.
        let rows: String = (0..100_000).map(|i| format!("{i}\trow {i}\n")).collect();
        psql(&format!(
            "CREATE TABLE many (id int, body text);\nCOPY many FROM STDIN;\n{rows}\\.\n"
        ));
        assert_eq!(
            psql("SELECT count(*), sum(id) FROM many;"),
            "100000|4999950000\n"
        );
        assert_eq!(
            psql("COPY (SELECT * FROM many ORDER BY id) TO STDOUT;"),
            rows
        );
        psql_by(
            under_run,
            "BEGIN; INSERT INTO t VALUES (3, 'lost too'); ROLLBACK; BEGIN; INSERT INTO t VALUES (4, 'run'); COMMIT;",
        );
        assert_eq!(psql("SELECT body FROM t WHERE id > 1;"), "run\n");
        let copied = psql_by(
            under_run,
            "COPY (SELECT * FROM many ORDER BY id) TO STDOUT;",
        );
        assert_eq!(copied, rows);
        // And as the server itself sees it.
        let inside = namespace.exec(
            "postgres",
            &[
                "runuser",
                "-u",
                "postgres",
                "--",
                "psql",
                "-U",
                "tp",
                "-At",
                "-c",
                "SELECT count(*) FROM t",
                "tp",
            ],
        );
        assert_eq!(inside.trim(), "2");
    });
}

#[test]
fn mariadb_commits_and_rolls_back() {
    with_server("mariadb", 3306, |client, under_run, namespace| {
        let sql_by = |client: Client<'_>, sql: &str| {
            client(
                &[
                    "mariadb",
                    "--host=mariadb",
                    "--user=tp",
                    "--password=tp",
                    "--skip-ssl",
                    "-BN",
                    "tp",
                ],
                sql,
            )
            .ok()
            .out()
        };
        let sql = |text: &str| sql_by(client, text);
        sql("CREATE TABLE t (id INT PRIMARY KEY, body TEXT) ENGINE=InnoDB;");
        sql("START TRANSACTION; INSERT INTO t VALUES (1, 'kept'); COMMIT;");
        sql("START TRANSACTION; INSERT INTO t VALUES (2, 'lost'); ROLLBACK;");
        assert_eq!(sql("SELECT id, body FROM t;"), "1\tkept\n");
        sql_by(
            under_run,
            "START TRANSACTION; INSERT INTO t VALUES (3, 'run'); COMMIT;",
        );
        assert_eq!(
            sql_by(under_run, "SELECT id, body FROM t;"),
            "1\tkept\n3\trun\n"
        );
        let inside = namespace.exec(
            "mariadb",
            &[
                "mariadb",
                "-utp",
                "-ptp",
                "-h127.0.0.1",
                "-BNe",
                "SELECT count(*) FROM t",
                "tp",
            ],
        );
        assert_eq!(inside.trim(), "2");
    });
}

#[test]
fn rabbitmq_gives_back_what_was_published() {
    with_server("rabbitmq", 5672, |client, under_run, namespace| {
        let url = "--url=amqp://guest:guest@rabbitmq:5672/%2f";
        client(
            &["amqp-declare-queue", url, "--queue=work", "--durable"],
            "",
        )
        .ok();
        for i in 0..3 {
            let body = format!("message {i}: {}", "x".repeat(50_000));
            client(
                &["amqp-publish", url, "--routing-key=work", "--persistent"],
                &body,
            )
            .ok();
        }
        let depth = namespace.exec(
            "rabbitmq",
            &[
                "rabbitmqctl",
                "-q",
                "-n",
                "rabbit@localhost",
                "list_queues",
                "name",
                "messages",
            ],
        );
        assert!(depth.contains("work\t3"), "{depth}");
        for i in 0..3 {
            let got = client(&["amqp-get", url, "--queue=work"], "").ok().out();
            assert_eq!(got, format!("message {i}: {}", "x".repeat(50_000)));
        }
        client(&["amqp-get", url, "--queue=work"], "").exits(2);
        let publish = ["amqp-publish", url, "--routing-key=work"];
        under_run(&publish, "from tp run").ok();
        let got = under_run(&["amqp-get", url, "--queue=work"], "").ok();
        assert_eq!(got.out(), "from tp run");
    });
}
