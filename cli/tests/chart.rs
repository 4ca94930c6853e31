//! The Helm chart holds what `tp install` applies, and nothing else.
//!
//! Its template is written from the same manifests, with Helm's expressions where the settings stand. When this fails
//! after a change of the manifests, `UPDATE_CHART=1 cargo test -p tp --test chart` writes the template anew.

use std::path::PathBuf;

use tp_cli::install::manifests::{self, Layer, Manifest};
use tp_cli::install::webhook::Certificate;
use tp_cli::install::{Settings, VERSION};
use tp_cli::report;

const NAMESPACE: &str = "chart-namespace";
const IMAGE: &str = "chart.invalid/image";
const SECRET: &str = "chart-pull-secret";
const REPLICAS: u16 = 61;
const ATTACHED: &str = "chart-attached-namespace";
const CERTIFICATE: &str = "chart-certificate";
const KEY: &str = "chart-key";

#[test]
fn the_template_is_what_install_applies() {
    let path = chart().join("templates/manager.yaml");
    let expected = template();

    if std::env::var_os("UPDATE_CHART").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }

    assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), expected);
}

#[test]
fn the_chart_carries_this_release() {
    let chart = std::fs::read_to_string(chart().join("Chart.yaml")).unwrap();

    assert!(
        chart.contains(&format!("\nversion: {VERSION}\n")),
        "{chart}"
    );
    assert!(
        chart.contains(&format!("\nappVersion: {VERSION}\n")),
        "{chart}"
    );
}

fn chart() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../charts/tp")
}

/// Helm makes the namespace itself.
fn template() -> String {
    let settings = Settings {
        namespace: NAMESPACE.to_owned(),
        image: Some(IMAGE.to_owned()),
        replicas: REPLICAS,
        pull_secrets: vec![SECRET.to_owned()],
        namespaces: vec![ATTACHED.to_owned()],
        ranges_by_dry_run: true,
        certificate: Some(Certificate {
            certificate: CERTIFICATE.to_owned(),
            key: KEY.to_owned(),
        }),
        native_sidecars: true,
    };
    let mut manifests = manifests::all(&settings);
    // Where no namespaces are given, one binding stands for them.
    let everywhere = manifests::all(&Settings {
        namespaces: Vec::new(),
        ..settings
    });
    let place = manifests.iter().position(is_bound_by_name);
    let place = place.expect("each namespace that is named has its binding");
    let binding = everywhere.into_iter().find(|manifest| {
        let object = &manifest.object;
        object["kind"] == "ClusterRoleBinding" && object["metadata"]["name"] == "tp-manager-attach"
    });
    manifests.insert(place, binding.expect("one binding is for all namespaces"));
    let objects = manifests
        .iter()
        .filter(|manifest| manifest.layer != Layer::Namespace);
    let documents: Vec<_> = objects.map(document).collect();
    CERTIFICATE_OF_A_RELEASE.to_owned() + &documents.concat()
}

/// As `tp install` does: the one that is there stays, and else it is made by who installs.
const CERTIFICATE_OF_A_RELEASE: &str = r#"{{- $name := printf "tp-webhook.%s.svc" .Release.Namespace }}
{{- $made := genSelfSignedCert $name nil (list $name) 36500 }}
{{- $certificate := $made.Cert | b64enc }}
{{- $key := $made.Key | b64enc }}
{{- with lookup "v1" "Secret" .Release.Namespace "tp-webhook" }}
{{- $certificate = index .data "tls.crt" }}
{{- $key = index .data "tls.key" }}
{{- end }}
"#;

fn document(Manifest { object, .. }: &Manifest) -> String {
    let yaml = report::yaml(object).expect("manifests have a YAML form");
    assert!(
        !yaml.contains("{{"),
        "Helm would take this for an expression: {yaml}"
    );
    let filled = EXPRESSIONS
        .iter()
        .fold(yaml, |yaml, (from, to)| yaml.replace(from, to));
    match object["kind"].as_str() {
        Some("PodDisruptionBudget") => {
            format!("{{{{- if gt (int .Values.replicas) 1 }}}}\n---\n{filled}{{{{- end }}}}\n")
        }
        Some("ClusterRoleBinding") if object["metadata"]["name"] == "tp-manager-attach" => {
            format!("{{{{- if not .Values.namespaces }}}}\n---\n{filled}{{{{- end }}}}\n")
        }
        Some("RoleBinding") if object["metadata"]["namespace"] == ATTACHED => {
            let filled = filled.replace("{{ .Release", "{{ $.Release");
            format!("{{{{- range .Values.namespaces }}}}\n---\n{filled}{{{{- end }}}}\n")
        }
        _ => format!("---\n{filled}"),
    }
}

fn is_bound_by_name(manifest: &Manifest) -> bool {
    manifest.object["metadata"]["namespace"] == ATTACHED
}

const EXPRESSIONS: &[(&str, &str)] = &[
    (
        "    tp.dev/namespaces: chart-attached-namespace\n",
        "    {{- with .Values.namespaces }}\n    tp.dev/namespaces: {{ join \",\" . | quote }}\n    {{- end }}\n",
    ),
    (
        "namespace: chart-attached-namespace\n",
        "namespace: {{ . | quote }}\n",
    ),
    (
        "namespace: chart-namespace\n",
        "namespace: {{ .Release.Namespace | quote }}\n",
    ),
    (
        "image: chart.invalid/image\n",
        "image: {{ required \"image is needed\" .Values.image | quote }}\n",
    ),
    (
        "value: chart.invalid/image\n",
        "value: {{ .Values.image | quote }}\n",
    ),
    ("chart-certificate", "{{ $certificate }}"),
    ("chart-key", "{{ $key }}"),
    (
        "- name: TP_NATIVE_SIDECARS\n          value: \"true\"\n",
        "- name: TP_NATIVE_SIDECARS\n          value: {{ semverCompare \">=1.32-0\" .Capabilities.KubeVersion.Version | quote }}\n",
    ),
    // Inside of the manager's fence. Neither can hold a quote.
    ("chart.invalid/image", "{{ .Values.image }}"),
    ("chart-namespace", "{{ .Release.Namespace }}"),
    ("replicas: 61\n", "replicas: {{ .Values.replicas }}\n"),
    (
        "app.kubernetes.io/managed-by: tp\n",
        "app.kubernetes.io/managed-by: {{ .Release.Service }}\n",
    ),
    (
        "      imagePullSecrets:\n      - name: chart-pull-secret\n",
        "      {{- with .Values.pullSecrets }}\n      imagePullSecrets:\n      {{- range . }}\n      - name: {{ . | quote }}\n      {{- end }}\n      {{- end }}\n",
    ),
    (
        "- apiGroups:\n  - \"\"\n  resources:\n  - services\n  verbs:\n  - create\n",
        "{{- if semverCompare \"<1.33-0\" .Capabilities.KubeVersion.Version }}\n- apiGroups:\n  - \"\"\n  resources:\n  - services\n  verbs:\n  - create\n{{- end }}\n",
    ),
];

#[test]
fn every_setting_has_its_expression() {
    let template = template();

    for sentinel in [
        NAMESPACE,
        IMAGE,
        SECRET,
        ATTACHED,
        CERTIFICATE,
        KEY,
        "replicas: 61",
    ] {
        assert!(!template.contains(sentinel), "{sentinel}");
    }
    for (_, expression) in EXPRESSIONS {
        assert!(template.contains(expression), "{expression}");
    }
}
