{{/* What the parts have in common. Each template is given `root` (the chart's $) and `name`, the part's. */}}

{{- define "collage.full" -}}
{{ .root.Release.Name }}-{{ .name }}
{{- end }}

{{- define "collage.selector" -}}
app.kubernetes.io/name: collage-diffusion
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end }}

{{- define "collage.metadata" -}}
name: {{ include "collage.full" . }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "collage.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* An image of ours: `image` says which. */}}
{{- define "collage.image" -}}
{{- $image := .root.Values.image -}}
{{ $image.registry }}collage-{{ .image }}:{{ $image.tag }}{{ with get $image.digests .image }}@{{ . }}{{ end }}
{{- end }}

{{/* Who has a pod: nobody the API server would listen to. */}}
{{- define "collage.account" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "collage.metadata" . | nindent 2 }}
automountServiceAccountToken: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The head of every pod's spec. `seconds`: what it has to end in. `values`: of the part, where it has any. */}}
{{- define "collage.pod" -}}
serviceAccountName: {{ include "collage.full" . }}
automountServiceAccountToken: false
# Variables made of the names of Services would be taken for settings.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .seconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .values }}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "collage.selector" $ | nindent 8 }}
{{- end }}
{{- end }}

{{- define "collage.confined" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Keeps a pod answering while others still point to it. */}}
{{- define "collage.forgotten" -}}
lifecycle:
  preStop:
    sleep: {seconds: {{ .root.Values.drain.forgetSeconds }}}
{{- end }}

{{- define "collage.grace" -}}
{{ add .root.Values.drain.forgetSeconds .root.Values.drain.finishSeconds }}
{{- end }}

{{- define "collage.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "collage.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "collage.selector" . | nindent 6 }}
{{- end }}

{{/* Settings, by name, as variables. */}}
{{- define "collage.settings" -}}
{{- range $name, $value := . }}
- name: COLLAGE_{{ upper $name }}
  value: {{ (kindIs "string" $value | ternary $value (toJson $value)) | quote }}
{{- end }}
{{- end }}

{{- define "collage.secret" -}}
- name: {{ .variable }}
  valueFrom:
    secretKeyRef: {name: {{ .root.Values.secrets.name }}, key: {{ .key }}}
{{- end }}

{{/* COLLAGE_BLOBS, and the secrets it is made of where the server is ours. */}}
{{- define "collage.blobs" -}}
{{- if .root.Values.storage.inside }}
{{- include "collage.secret" (dict "root" .root "variable" "S3_KEY" "key" "s3-key") }}
{{ include "collage.secret" (dict "root" .root "variable" "S3_SECRET" "key" "s3-secret") }}
- name: COLLAGE_BLOBS
  value: s3://$(S3_KEY):$(S3_SECRET)@{{ .root.Release.Name }}-storage:8333/collage
{{- else }}
{{- include "collage.secret" (dict "root" .root "variable" "COLLAGE_BLOBS" "key" "blobs") }}
{{- end }}
{{- end }}

{{/* COLLAGE_JOBS, likewise. */}}
{{- define "collage.jobs" -}}
{{- if .root.Values.queue.servers }}
{{- include "collage.secret" (dict "root" .root "variable" "NATS_PASSWORD" "key" "nats-password") }}
- name: COLLAGE_JOBS
  value: nats://collage:$(NATS_PASSWORD)@{{ .root.Release.Name }}-queue:4222
{{- else }}
{{- include "collage.secret" (dict "root" .root "variable" "COLLAGE_JOBS" "key" "jobs") }}
{{- end }}
{{- end }}

{{- define "collage.hasWeights" -}}
{{- if or .root.Values.models.claim .root.Values.models.image }}yes{{ end }}
{{- end }}

{{/* The volume of the weights. */}}
{{- define "collage.weights" -}}
- name: models
  {{- if .root.Values.models.claim }}
  persistentVolumeClaim: {claimName: {{ .root.Values.models.claim }}, readOnly: {{ .readOnly }}}
  {{- else }}
  image: {reference: {{ .root.Values.models.image | quote }}, pullPolicy: {{ .root.Values.image.pullPolicy }}}
  {{- end }}
{{- end }}

{{/* Whether a part asks for a device, of which a node has few: then an old pod goes before a new one comes. */}}
{{- define "collage.hasDevice" -}}
{{- range $name, $_ := .values.resources.limits }}{{ if contains "/" $name }}yes{{ end }}{{ end }}
{{- end }}
