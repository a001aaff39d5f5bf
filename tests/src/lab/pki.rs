//! Keys, certificates, tokens and kubeconfig files of one lab.

use std::fs;
use std::io::Read;
use std::path::Path;

use super::plan::{API_PORT, CONTROL_PLANE, Link, NODES};
use super::process::run;

/// Certificates: file name, subject, and subject alternative names.
fn certificates(link: Link) -> [(&'static str, &'static str, String); 2] {
    let names = format!(
        "IP:127.0.0.1,IP:10.96.0.1,IP:{CONTROL_PLANE},IP:{},DNS:kubernetes,DNS:kubernetes.default,\
         DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local",
        link.control_plane
    );
    [
        ("apiserver", "/CN=kube-apiserver", names),
        (
            "kubelet-client",
            "/O=system:masters/CN=kube-apiserver-kubelet-client",
            "DNS:kubelet-client".to_owned(),
        ),
    ]
}

/// Users that present a token: user name, and its group.
fn users() -> Vec<(String, &'static str)> {
    let mut users = vec![
        ("admin".to_owned(), "system:masters"),
        ("system:kube-controller-manager".to_owned(), ""),
        ("system:kube-scheduler".to_owned(), ""),
        ("system:kube-proxy".to_owned(), ""),
    ];
    users.extend(NODES.map(|node| (format!("system:node:{}", node.name()), "system:nodes")));
    users
}

/// Name of a user's kubeconfig file in the folder of [`create`].
pub fn kubeconfig_name(user: &str) -> String {
    format!("{}.kubeconfig", user.rsplit(':').next().unwrap_or(user))
}

/// Makes everything in `directory`; the administrator's kubeconfig is `admin.kubeconfig`.
pub fn create(directory: &Path, link: Link) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    let path = |name: &str| directory.join(name).display().to_string();
    let key = |name: &str| {
        run("openssl", &["genpkey", "-quiet", "-algorithm", "EC", "-pkeyopt", CURVE, "-out", name])
    };
    let (ca_key, ca) = (path("ca.key"), path("ca.crt"));
    key(&ca_key)?;
    run(
        "openssl",
        &["req", "-x509", "-new", "-key", &ca_key, "-subj", "/CN=aegis-lab", "-days", "30", "-out", &ca],
    )?;
    for (name, subject, names) in certificates(link) {
        let (key_file, request, file) =
            (path(&format!("{name}.key")), path(&format!("{name}.csr")), path(&format!("{name}.crt")));
        let extension = format!("subjectAltName={names}");
        key(&key_file)?;
        run(
            "openssl",
            &["req", "-new", "-key", &key_file, "-subj", subject, "-addext", &extension, "-out", &request],
        )?;
        run(
            "openssl",
            &[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                &ca,
                "-CAkey",
                &ca_key,
                "-CAcreateserial",
                "-days",
                "30",
                "-copy_extensions",
                "copy",
                "-out",
                &file,
            ],
        )?;
    }
    let service_account = path("sa.key");
    key(&service_account)?;
    run("openssl", &["pkey", "-in", &service_account, "-pubout", "-out", &path("sa.pub")])?;

    let authority = run("openssl", &["base64", "-A", "-in", &ca])?;
    let mut tokens = String::new();
    for (user, group) in users() {
        let token = token()?;
        tokens += &format!("{token},{user},{user},\"{group}\"\n");
        // Outside (the administrator) the control plane is reached over its link to the root namespace.
        let server = if user == "admin" { link.control_plane } else { CONTROL_PLANE };
        fs::write(
            directory.join(kubeconfig_name(&user)),
            kubeconfig(&server.to_string(), authority.trim(), &token),
        )?;
    }
    fs::write(directory.join("tokens.csv"), tokens)?;
    Ok(())
}

const CURVE: &str = "ec_paramgen_curve:prime256v1";

fn token() -> anyhow::Result<String> {
    let mut bytes = [0_u8; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn kubeconfig(server: &str, authority: &str, token: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: Config
clusters: [{{name: lab, cluster: {{server: "https://{server}:{API_PORT}", certificate-authority-data: {authority}}}}}]
users: [{{name: lab, user: {{token: "{token}"}}}}]
contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]
current-context: lab
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_a_file_of_its_own() {
        let mut names: Vec<String> = users().iter().map(|(user, _)| kubeconfig_name(user)).collect();
        assert!(
            names.contains(&"admin.kubeconfig".to_owned()) && names.contains(&"n1.kubeconfig".to_owned())
        );
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
