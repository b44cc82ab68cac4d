// Package api holds HostClass: what an operator says of the hosts that a NodePool may
// bring, in the driver's words. It is the NodeClass of this cloud provider.
package api

import (
	_ "embed"

	"github.com/awslabs/operatorpkg/object"
	"github.com/awslabs/operatorpkg/status"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
	karpenter "sigs.k8s.io/karpenter/pkg/apis/v1"
)

const Group = "spindrift.dev"

// Names that the pool's hosts carry: pool-agent/cell/src/names.rs has the same.
const (
	// ClassLabel is a Node's: what kind of host it is. Claims may select it.
	ClassLabel = Group + "/class"
	// HostAnnotation is a bootstrap token's: the one host that it is good for.
	HostAnnotation = Group + "/host"
	// CellLabel is an instance's: which cell asked for it, by the UID of its
	// kube-system namespace. Two cells may share a driver.
	CellLabel = Group + "/cell"
	// HashAnnotation is a NodeClaim's: of the HostClass that its host was made by.
	HashAnnotation = Group + "/host-class-hash"
	// BootstrapGroup is the bootstrap tokens'.
	BootstrapGroup = "system:bootstrappers:spindrift"
)

//go:embed hostclass.yaml
var hostClassCRD []byte

// CRD is HostClass's definition.
var CRD = object.Unmarshal[apiextensionsv1.CustomResourceDefinition](hostClassCRD)

func init() {
	version := schema.GroupVersion{Group: Group, Version: "v1alpha1"}
	metav1.AddToGroupVersion(scheme.Scheme, version)
	scheme.Scheme.AddKnownTypes(version, &HostClass{}, &HostClassList{})
	// A claim may select a class that no NodePool names: instance types know theirs.
	karpenter.WellKnownLabels = karpenter.WellKnownLabels.Insert(ClassLabel)
}

type HostClassSpec struct {
	// Class is the hosts' label spindrift.dev/class.
	Class string `json:"class"`
	// Zones that may be used; empty: all that the driver offers.
	Zones []string `json:"zones,omitempty"`
	// Shapes that may be used; empty: all that the driver offers.
	Shapes []string `json:"shapes,omitempty"`
	// Parameters are for the driver alone: an image, a network.
	Parameters map[string]string `json:"parameters,omitempty"`
}

type HostClassStatus struct {
	// Shapes that the driver offers for this class now.
	Shapes     []string           `json:"shapes,omitempty"`
	Conditions []status.Condition `json:"conditions,omitempty"`
}

// HostClass is cluster-scoped.
type HostClass struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   HostClassSpec   `json:"spec"`
	Status HostClassStatus `json:"status,omitempty"`
}

type HostClassList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []HostClass `json:"items"`
}

func (c *HostClass) StatusConditions(options ...status.ForOption) status.ConditionSet {
	return status.NewReadyConditions().For(c, options...)
}

func (c *HostClass) GetConditions() []status.Condition { return c.Status.Conditions }

func (c *HostClass) SetConditions(conditions []status.Condition) { c.Status.Conditions = conditions }

func (c *HostClass) DeepCopyInto(out *HostClass) {
	*out = *c
	c.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.Zones = append([]string(nil), c.Spec.Zones...)
	out.Spec.Shapes = append([]string(nil), c.Spec.Shapes...)
	if c.Spec.Parameters != nil {
		out.Spec.Parameters = make(map[string]string, len(c.Spec.Parameters))
		for key, value := range c.Spec.Parameters {
			out.Spec.Parameters[key] = value
		}
	}
	out.Status.Shapes = append([]string(nil), c.Status.Shapes...)
	out.Status.Conditions = nil
	for i := range c.Status.Conditions {
		out.Status.Conditions = append(out.Status.Conditions, *c.Status.Conditions[i].DeepCopy())
	}
}

func (c *HostClass) DeepCopy() *HostClass {
	out := new(HostClass)
	c.DeepCopyInto(out)
	return out
}

func (c *HostClass) DeepCopyObject() runtime.Object { return c.DeepCopy() }

func (l *HostClassList) DeepCopyObject() runtime.Object {
	out := &HostClassList{TypeMeta: l.TypeMeta}
	l.ListMeta.DeepCopyInto(&out.ListMeta)
	for i := range l.Items {
		out.Items = append(out.Items, *l.Items[i].DeepCopy())
	}
	return out
}
