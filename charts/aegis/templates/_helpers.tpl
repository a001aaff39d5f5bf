{{/* Labels of every object; call with (list . "component"). */}}
{{- define "aegis.labels" -}}
{{- $root := index . 0 -}}
{{ include "aegis.selector" . }}
app.kubernetes.io/part-of: aegis
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Labels that select the pods of a component; they never change. */}}
{{- define "aegis.selector" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end }}

{{/* User name of the operator at the API server. */}}
{{- define "aegis.operatorUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:aegis-operator
{{- end }}

{{/* User name of the node agents at the API server. */}}
{{- define "aegis.agentUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:aegis-node-agent
{{- end }}
