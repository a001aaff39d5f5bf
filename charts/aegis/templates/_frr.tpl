{{/* Files of the FRR sidecar: the daemons' configuration, the script that runs them, and the one that asks after them. */}}
{{- define "aegis.frr" -}}
{{- $announcement := .Values.agent.announcement -}}
{{- $frr := $announcement.frr -}}
{{- $table := int $announcement.table -}}
{{- if eq $announcement.routingDaemon "BIRD" }}{{ fail "agent.announcement: frr.enabled runs FRR, so routingDaemon can't be BIRD" }}{{ end -}}
{{- if or (lt $table 1) (gt $table 252) }}{{ fail "agent.announcement.table: FRR reads tables 1 to 252" }}{{ end -}}
zebra.conf: |
  log stdout informational
  ! The agent's table. Zebra copies it into its own, and so into the main table.
  ip import-table {{ $table }}
bgpd.conf: |
  log stdout informational
  router bgp {{ int64 $frr.asn }}
   ! The start script puts the node's address here: what FRR would choose may be the same on all nodes.
   bgp router-id NODE_ADDRESS
   bgp log-neighbor-changes
   no bgp default ipv4-unicast
   ! What may come in and go out is said below.
   no bgp ebgp-requires-policy
   ! No graceful restart: every node takes every packet, so one whose daemon is away is better left out.
   bgp graceful-restart-disable
   timers bgp 1 3
  {{- range $frr.neighbors }}
   neighbor {{ .address }} remote-as {{ int64 .asn }}
   neighbor {{ .address }} timers connect 1
  {{- if .password }}
   neighbor {{ .address }} password {{ .password }}
  {{- end }}
  {{- if ne .bfd false }}
   neighbor {{ .address }} bfd profile aegis
  {{- end }}
  {{- end }}
   address-family ipv4 unicast
    redistribute table {{ $table }} route-map AEGIS-OWN
  {{- range $frr.neighbors }}
    neighbor {{ .address }} activate
    neighbor {{ .address }} route-map AEGIS-OWN out
    neighbor {{ .address }} route-map AEGIS-NOTHING in
  {{- end }}
   exit-address-family
   address-family ipv6 unicast
    ! FRR before 10 reads no table of its own for IPv6. The agent's routes in the main table are known by their metric.
    redistribute kernel route-map AEGIS-KERNEL6
  {{- range $frr.neighbors }}
    neighbor {{ .address }} activate
    neighbor {{ .address }} route-map AEGIS-OWN6 out
    neighbor {{ .address }} route-map AEGIS-NOTHING in
  {{- end }}
   exit-address-family
  exit
  ! Single addresses (of IPv6, /64s and the nodes' parts of them) only, and nothing is learnt. Origin and metric are what BIRD says too, so that paths by either are equal.
  ip prefix-list AEGIS-OWN seq 5 permit 0.0.0.0/0 ge 32
  route-map AEGIS-OWN permit 10
   match ip address prefix-list AEGIS-OWN
   set origin igp
   set metric 0
  exit
  ipv6 prefix-list AEGIS-OWN6 seq 5 permit ::/0 ge 64 le 64
  ipv6 prefix-list AEGIS-OWN6 seq 10 permit ::/0 ge 80 le 80
  route-map AEGIS-KERNEL6 permit 10
   match metric 16711680
   match ipv6 address prefix-list AEGIS-OWN6
   set origin igp
   set metric 0
  exit
  route-map AEGIS-OWN6 permit 10
   match ipv6 address prefix-list AEGIS-OWN6
  exit
  route-map AEGIS-NOTHING deny 10
  exit
bfdd.conf: |
  log stdout informational
  bfd
   profile aegis
    detect-multiplier {{ int $frr.bfd.multiplier }}
    receive-interval {{ int $frr.bfd.intervalMilliseconds }}
    transmit-interval {{ int $frr.bfd.intervalMilliseconds }}
   exit
  exit
start: |
  #!/bin/sh
  # Runs zebra, bgpd and bfdd until one of them ends; then the kubelet starts all of them again.
  set -eu
  sockets=/var/run/frr
  umask 027
  mkdir -p "$sockets"
  for daemon in zebra bgpd bfdd; do
    sed "s/NODE_ADDRESS/$NODE_ADDRESS/" "$(dirname "$0")/$daemon.conf" > "$sockets/$daemon.conf"
  done
  chown -R frr:frr "$sockets"
  # No port is opened for a terminal, nor for neighbours: this end connects.
  /usr/lib/frr/zebra -P 0 -f "$sockets/zebra.conf" &
  zebra=$!
  # A bgpd that does not find zebra tries again 10 s later. Until then it does not know the uplink's IPv6 address, and the next hop
  # that it names is of no use to anybody, for as long as the session lasts.
  until vtysh -d zebra -c 'show version' >/dev/null 2>&1; do
    kill -0 "$zebra" || exit 1
    sleep 0.1
  done
  /usr/lib/frr/bgpd -P 0 -p 0 -f "$sockets/bgpd.conf" &
  bgpd=$!
  /usr/lib/frr/bfdd -P 0 -f "$sockets/bfdd.conf" &
  bfdd=$!
  end() {
    kill "$bgpd" "$bfdd" "$zebra" 2>/dev/null || true
    # The kubelet's grace period is as long as an agent may need that leaves the node.
    { sleep 4; kill -9 "$bgpd" "$bfdd" "$zebra"; } 2>/dev/null &
    wait "$bgpd" "$bfdd" "$zebra" || true
    exit 0
  }
  trap end TERM INT
  while kill -0 "$zebra" && kill -0 "$bgpd" && kill -0 "$bfdd"; do
    sleep 1 &
    wait "$!"
  done
  kill "$bgpd" "$bfdd" "$zebra" 2>/dev/null || true
  exit 1
ready: |
  #!/bin/sh
  # Some neighbour has been told: the next node's agent may be replaced.
  vtysh -d bgpd -c 'show bgp ipv4 unicast summary json' 2>/dev/null | grep -q '"state": *"Established"'
{{- end }}
